"""Universal adversarial perturbations: crafting, controls, files."""
