"""Sessions of training as their caller sees them: steps that happen once, whatever is lost meanwhile. No torch here."""
