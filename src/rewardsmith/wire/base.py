"""The two kinds of wire model: what is asked and what is answered. Names travel in camelCase.

Unknown fields of a request are refused, unknown fields of an answer are ignored, so that either side may be the newer
one.
"""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class Request(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)
