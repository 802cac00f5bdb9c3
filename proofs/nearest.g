# A rounding to nearest moves a number by NEAREST ULP at most, which are 2 UNIT each from 1 to 2.
@rnd = float<$FORMAT, ne>;

{ x in [1, 2] -> |rnd(x) - x| / (2 * $UNIT) in [0, $NEAREST] }
