"""Images by name, folder or file; subsets with their ground truth; batches as a function of (seed, step)."""
