# The loss of one element below the knee, |d| <= beta: d is rounded once, core is d itself, halving
# is exact, what lies beyond the knee is 0 and added exactly. Normal numbers.
@rnd = float<$FORMAT, ne>;

d = rnd(D);
ratio rnd= d / beta;
half = 0.5 * d;
loss rnd= half * ratio;

Ratio = D / beta;
Half = 0.5 * D;
Loss = Half * Ratio;

{ |D| in [$SMALL, $LARGE] /\ |beta| >= $SMALL /\ |d / beta| in [$SMALL, 1]
  /\ |half * ratio| in [$SMALL, $LARGE]
  -> loss -/ Loss in [-$BOUND, $BOUND] }
