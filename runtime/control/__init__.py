"""From what a user paints to what the UNet is given: regions, masks, pictures, features."""
