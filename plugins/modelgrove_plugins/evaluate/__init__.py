"""How well a denoiser does with real pictures: evaluators, which report scores and guide mergers that search."""
