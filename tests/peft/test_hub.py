"""Adapters pushed to a hub and loaded from it by name, against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.peft.hub_server import serving


def test_a_session_with_the_hub(tmp_path: Path) -> None:
    with serving() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.peft.hub_client", str(tmp_path)],
            env=environment, capture_output=True, text=True, timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n" + "\n".join(hub.asked[-20:])
        assert (tmp_path / "done").exists()
        pushed = hub.repositories["me/adapter"]
    assert set(pushed) == {"main", "later"}
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert names | {f"other/{name}" for name in names} <= set(pushed["later"])
    assert "model.safetensors" not in pushed["main"]
    config = json.loads(pushed["main"]["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "me/base"
    assert b"mine" in pushed["main"]["README.md"]
    assert set(hub.repositories["me/config"]["main"]) == {"adapter_config.json"}
