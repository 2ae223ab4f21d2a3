"""``tiue bench``: speed and quality of students, their teacher and the alternatives, in one report."""
