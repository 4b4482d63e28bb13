"""The HTTP server: an engine that answers many requests at once, the processes around it, the API, keys and limits."""
