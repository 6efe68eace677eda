"""From a recipe to a finished run: plan, loop, checkpoints, events, report. No torch until a run starts."""
