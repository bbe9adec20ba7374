"""The API of a Hugging Face hub, so far as tools ask it for models: they work with `HF_ENDPOINT` set to our address."""
