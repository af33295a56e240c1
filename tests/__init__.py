"""The tests mirror src/; what they share lies in helpers/."""
