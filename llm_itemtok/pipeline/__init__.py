"""A recipe carried out, stage by stage: here what `RunConfig` holds becomes arguments of components."""
