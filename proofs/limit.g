# Up to LIMIT / u elements: sigma is 4 times the naive sum at least, which is off by nu / (1 - nu)
# at most, so that no element is beyond what split.g goes to, and no sum of parts beyond sigma; the
# rests lose no more than ELEMENT roundings do. nu is n u.
naive = nu / (1 - nu);
sum = 0.25 / (1 - naive);

{ nu in [0, $LIMIT] -> sum in [0, 0.26] /\ sum + nu in [0, 1] /\ $SIGMA * nu * nu in [0, $LOST] }
