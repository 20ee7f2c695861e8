"""Pure functions that several methods share: schedules, growth of ranks, masks, random numbers,
selection of the largest entries, and AdaLoRA's triplets."""
