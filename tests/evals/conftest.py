from tests.train.conftest import home, job

__all__ = ["home", "job"]
