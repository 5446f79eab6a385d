"""Energy terms written as Lepton expressions, one family a file."""
