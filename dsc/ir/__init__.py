"""The intermediate representation: types, graphs, operators, text form, verifier, interpreter."""
