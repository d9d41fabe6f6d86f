"""What one step of training is: loss, gradients over micro-batches, optimizer, schedules, metrics."""
