# One rounding moves a normal number by UNIT of it at most. A product with a weight, a mean's
# division, the last addition of CompensatedSum and a cast are one each.
@rnd = float<$FORMAT, ne>;

{ |x| in [$SMALL, $LARGE] -> rnd(x) -/ x in [-$UNIT, $UNIT] }
