# factor.g again, for a sum of weights that is divided by, 1 - q. The sum of the losses errs as
# much, and is in p: p is half of s at least. s counts SUMS of them, and where s + s^2 is beyond
# LARGEST nothing is said.
s = p + ($SUMS - 1) * q;

{ s in [0, $LARGEST] /\ q in [0, 1] /\ p - 0.5 * s >= 0
  -> (1 + p + p * p) - (1 + s + s * s) * (1 - q) <= 0 }

(1 + p + p * p) - (1 + s + s * s) * (1 - q)
  -> q * (s * (s - 0.5) - (p - 0.5 * s)) + (2 - $SUMS) * q * (1 + p + s);
