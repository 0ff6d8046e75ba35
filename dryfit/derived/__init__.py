"""The derived form: a step's allocations from records of its family, without torch, equal to the trace's."""
