"""Pure functions that several methods share: schedules, masks, random numbers, triplets."""
