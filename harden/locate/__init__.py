"""Locators: each gives every neuron a score, higher where it is more likely to gate refusal."""
