"""`fewstep bench`: how fast a student draws, beside its teacher, on every engine, and beside what others use."""
