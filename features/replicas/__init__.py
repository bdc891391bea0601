"""One prompt over several engine replicas: KV pages moved between them, or attended to where they are."""
