"""Hypothesis strategies for protobuf messages: well-formed messages with arbitrary content, and mutated bytes."""

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from([-(2**31), -1, 0, 1, 5, 2**31 - 1]),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from([-(2**63), -1, 0, 1, 7, 2**63 - 1]),
    FieldDescriptor.CPPTYPE_UINT32: st.sampled_from([0, 1, 2, 3, 40, 300, 2**32 - 1]),
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from([0, 1, 32, 64, 100, 2**63, 2**64 - 1]),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from(
        [0.0, -0.0, 0.3, 1.0, 2.0, -5.0, 1e300, float("inf"), float("nan")]
    ),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 5),
}
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["64", "n/2", "auto", "off"]),  # of star's options
    st.sampled_from(["", "a", "{}", '{"type": "integer"}', "[ab]+", "(", '{"star": 1}', "\x00", "x" * 300]),
)


def values(field: FieldDescriptor) -> st.SearchStrategy:
    if field.message_type is not None:
        return messages(field.message_type)
    return TEXT if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else NUMBERS[field.cpp_type]


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor) -> Message:
    """A message of a type with some of its fields set."""
    message = GetMessageClass(kind)()
    for field in draw(st.lists(st.sampled_from(list(kind.fields)), max_size=6)) if kind.fields else ():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            entries = draw(st.dictionaries(values(key), values(value), max_size=2))
            getattr(message, field.name).update(entries)
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field), max_size=3)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


@st.composite
def mutated(draw: st.DrawFn, message: Message) -> bytes:
    """The bytes of a message with a few bytes changed, removed or inserted."""
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        data[start : start + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)
