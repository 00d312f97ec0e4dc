"""Attention as graphs spell it: the texts of the examples and near misses of `raise_attention`."""

from __future__ import annotations

MASKED = """graph g(%q: f32[B,2,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,6]{more}) {{
  %i = arange {{start={start}, end={end}, dtype=i64}}
  %c = reshape %i {{shape=[S,1]}}
  %j = arange {{start=0, end=T, dtype=i64}}
  %m = {mask}
  %e = expand {last} {{shape=[B,1,S,T]}}
  %y = sdpa %q, %k, %v, %e {{scale=0.5}}
  return %y
}}"""
BY_LENGTHS = """graph g(%q: f32[B,2,S,4], %k: f32[B,2,S+P,4], %v: f32[B,2,S+P,6],
    %lengths: i64[B]) {{
  %i = arange {{start=0, end=S, dtype=i64}}
  %l = reshape %lengths {{shape=[B,1]}}
  %p = add %l, %i
  %c = reshape %p {{shape=[B,1,S,1]}}
  %j = arange {{start=0, end=S+P, dtype=i64}}
  %m = le %j, %c
  {more}
  %y = sdpa %q, %k, %v, {last} {{scale=0.5}}
  return %y
}}"""
WINDOW = """%w = full {{shape=[], value={width}, dtype=i64}}
  %d = sub %c, %w
  %g = {compare} %j, %d
  %h = logical_and %m, %g"""
CHUNK = """%w = full {shape=[], value=5, dtype=i64}
  %d = div %c, %w
  %e = div %j, %w
  %g = eq %e, %d
  %h = logical_and %m, %g"""
GROUPED = """graph g(%q: f32[B,6,S,4], %k: f32[B,2,S+P,4], %v: f32[B,2,S+P,5], %lengths: i64[B],
    @sinks: f32[6]) {{
  %qg = reshape %q {{shape=[B,2,3,S,4]}}
  %s = einsum %qg, %k {{eq="bgrsd,bgtd->bgrst"}}
  %n = full {{shape=[], value=0.5, dtype=f32}}
  %u = mul %s, %n
  %cap = full {{shape=[], value=3.0, dtype=f32}}
  %x = div %u, %cap
  %a = tanh %x
  %z = mul %a, %cap
  %i = arange {{start=0, end=S, dtype=i64}}
  %l = reshape %lengths {{shape=[B,1]}}
  %p = add %l, %i
  %c = reshape %p {{shape=[B,1,1,S,1]}}
  %j = arange {{start=0, end=S+P, dtype=i64}}
  %m = le %j, %c
  %low = full {{shape=[], value=-3e+38, dtype=f32}}
  %o = where %m, {shown}, %low
  %r = reshape @sinks {{shape=[1,2,3,1,1]}}
  %b = expand %r {{shape=[B,2,3,S,1]}}
  %t = concat %o, %b {{axis=4}}
  {after}
  %y = einsum %f, {values} {{eq="bgrst,bgtd->bgrsd"}}
  return %y
}}"""
DROPPED = """%w = softmax %t {axis=-1}
  %f = slice %w {axis=4, start=0, end=S+P}"""
REPEATED = """graph g(%q: f32[B,6,S,4], %k: f32[B,2,T,4], %v: f32[B,2,T,5]) {{
  %a = reshape %k {{shape=[B,2,1,T,4]}}
  %b = expand %a {{shape=[B,2,3,T,4]}}
  %c = reshape %b {{shape=[B,6,T,4]}}
  %d = reshape %v {{shape=[B,2,1,T,5]}}
  %e = expand %d {{shape=[B,2,3,T,5]}}
  %f = reshape %e {{shape=[B,6,T,5]}}
  {rest}
  return %y
}}"""
SPELLED = """graph g(%q: f32[B,2,S,4], %k: f32[B,2,S,4], %v: f32[B,2,S,6]) {{
  %t = permute %k {{dims=[0,1,3,2]}}
  %s = matmul %q, %t
  %n = full {{shape=[], value={scale}, dtype=f32}}
  %u = mul %s, %n
  %p = softmax %u {{axis={axis}}}
  %y = matmul %p, %v
  return %y
}}"""
