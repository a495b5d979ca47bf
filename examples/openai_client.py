"""A vote through OpenAI's client: `lim proxy`, then `python examples/openai_client.py QUESTION`.

The name of the model says how to vote; the field `lim` of the answer has the votes.
"""

import sys

import openai


def main(question: str, base_url: str = "http://127.0.0.1:30001/v1") -> None:
    client = openai.OpenAI(base_url=base_url, api_key="none")
    reply = client.chat.completions.create(
        model="adaptive@16?confidence=0.9",  # at most 16 chains; stops once the vote is settled
        messages=[{"role": "user", "content": question}],
        extra_body={"lim": {"template": "math"}},  # adds the words that ask for a boxed answer
    )
    print(reply.choices[0].message.content)
    print((reply.model_extra or {})["lim"]["votes"])


if __name__ == "__main__":
    main(*sys.argv[1:])
