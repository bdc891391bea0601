"""The compressed cache of Attamba models."""
