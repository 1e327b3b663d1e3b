"""One module for each resource of the HTTP API. Routes translate between HTTP and the store and decide nothing."""
