"""From a placement to a flash layout: plan, write, index, verify, restore."""
