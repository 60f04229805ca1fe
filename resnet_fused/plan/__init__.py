"""How a chain runs: the choice of its variant by a cost model or by what was measured, and the devices both know."""
