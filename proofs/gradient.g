# An element of a gradient summed back: 1, its exact value, and what its terms bring, e, rounded
# three times: the sum, over beta, over the count. The oracle is rounded once. gradient_bound
# computes e, all of whose terms are positive, SHORT of it at most, and says ROOM e + BACK u.
roundings = a + b + c + a * b + b * c + a * c + a * b * c; # (1 + a) (1 + b) (1 + c) - 1
oracle = 1 - o;

{ |a| in [0, $UNIT] /\ |b| in [0, $UNIT] /\ |c| in [0, $UNIT] /\ |o| in [0, $UNIT]
  /\ short in [0, $SHORT] /\ e in [$FEWEST, 1b1000]
  -> e * ($ROOM * (1 - short) - 1 - roundings) + $BACK * oracle - roundings - o >= 0 }
