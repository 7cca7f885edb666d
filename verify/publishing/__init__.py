"""Publishing a bundle that its report proves: card, gate, upload."""
