"""Makes ``pyreft.safetensors`` for `tests/oracles/test_golden.py`: interventions and positions of ``pyreft``.

It pins an older transformers, so it runs in an environment of its own, once:

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==4.45.1 pyreft==0.1.0
    /tmp/golden/bin/python tests/oracles/golden/make_pyreft.py

Hidden states of one prompt, each intervention's tensors and result in every position (fp32), and the positions
that it chooses for prompts of several lengths (-1 is padding).
"""

from __future__ import annotations

from pathlib import Path

import torch
from pyreft.dataset import get_intervention_locations
from pyreft.interventions import DireftIntervention, LoreftIntervention, NoreftIntervention
from safetensors.torch import save_file

WIDTH, RANK = 12, 3
LENGTHS = (2, 3, 4, 5, 6, 9, 12)
FIRST, LAST = 3, 2


def main() -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 12, WIDTH)
    found = {"h": h}
    kinds = {
        "loreft": LoreftIntervention,
        "noreft": NoreftIntervention,
        "direft": DireftIntervention,
    }
    for name, kind in kinds.items():
        unit = kind(
            embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32, add_bias=False
        ).eval()
        with torch.no_grad():
            result = unit(h)
            basis = unit.proj_layer.weight if name == "noreft" else unit.rotate_layer.weight.T
            found |= {
                f"{name}.basis": basis.clone().contiguous(), f"{name}.source": unit.learned_source.weight.clone(),
                f"{name}.b": unit.learned_source.bias.clone(), f"{name}.result": result.clone(),
            }  # fmt: skip
    for length in LENGTHS:
        ends = get_intervention_locations(
            last_position=length, first_n=FIRST, last_n=LAST, num_interventions=2
        )
        found[f"positions.{length}"] = torch.tensor(ends)
    save_file(
        {key: value.detach() for key, value in found.items()},
        Path(__file__).parent / "pyreft.safetensors",
    )


if __name__ == "__main__":
    main()
