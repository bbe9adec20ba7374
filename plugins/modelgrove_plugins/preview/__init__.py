"""Pictures of what a model does: the diffusers previewer, and sheets of previews."""
