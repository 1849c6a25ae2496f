"""Rules that merge whole weight changes number by number, each a file: its declaration, one pure
function."""
