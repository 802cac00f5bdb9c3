# What relative errors make together: 1 + s + s^2 at most, s their sum. One factor more, 1 + r,
# leaves that so, by induction.
s = p + r;

{ p in [0, $LARGEST] /\ r in [0, $LARGEST] -> (1 + p + p * p) * (1 + r) - (1 + s + s * s) <= 0 }

(1 + p + p * p) * (1 + r) - (1 + s + s * s) -> -r * (p * (1 - p) + r);
