"""What runs an artefact; one file a backend, all behind the protocol in `base`."""
