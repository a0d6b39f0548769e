"""From a trace to an order: co-activation counts, linking, baselines, their cost, and the placement file."""
