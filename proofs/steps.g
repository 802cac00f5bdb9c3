# Between a, from 1 to 2, and b = a / (1 - r), larger by the worst that r can make, lie (b - a) / (2
# u) steps at most: fewer where b is beyond 2, and b stays below 4. r / (1 - r) / u are no fewer.
b = a / (1 - r);

{ a in [1, 2] /\ r in [0, $LARGEST] -> b in [1, 4] /\ (b - a) / 2 - r / (1 - r) <= 0 }

(b - a) / 2 - r / (1 - r) -> (r / (1 - r)) * (a / 2 - 1) { 1 - r <> 0 };
