# Below 2^-54 of sigma, CompensatedSum leaves all of v to the rest.
@rnd = float<53, -1074, ne>;
v = rnd(any);
high = rnd(v + 1) - 1;

{ |v| in [0, 1b-54] -> high in [0, 0] }

high -> (rnd(v + 1) - (v + 1)) + v;
