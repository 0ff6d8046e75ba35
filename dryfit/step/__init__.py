"""What builds and takes a scenario's step: model, adapters, quantized weights, optimizer, objective, batch."""
