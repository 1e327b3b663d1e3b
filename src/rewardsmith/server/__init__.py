"""The HTTP API: `serve` runs it, `app` puts it together, `routes` has a module for each resource."""
