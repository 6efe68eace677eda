"""The core: contract, sites, bank, routes, attaching, merging, arithmetic, files."""
