"""A recipe carried out, stage by stage: the only reader of `RunConfig`."""
