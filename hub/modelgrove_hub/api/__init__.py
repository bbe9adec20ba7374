"""The hub over HTTP: our REST API, the API of a Hugging Face hub, and the web page."""
