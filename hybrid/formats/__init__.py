"""The leaf: what every engine knows of weights, and the values they all speak in; imports numpy."""
