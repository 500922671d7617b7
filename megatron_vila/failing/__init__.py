"""How the ranks of a run end together when one fails: what each writes down, who prints it, whom the others wait for."""
