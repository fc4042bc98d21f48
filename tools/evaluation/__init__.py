"""How explanations are judged: reference integrals, error measures, faithfulness and localisation."""
