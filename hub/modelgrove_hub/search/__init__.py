"""Finding models by what they do: text space, experts, FAISS indexes, queries."""
