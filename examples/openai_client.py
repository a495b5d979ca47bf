"""A vote through OpenAI's client: `python examples/openai_client.py [QUESTION] [BASE_URL]`.

It asks `lim proxy`. The name of the model says how to vote; the field `lim` of the answer has the
votes.
"""

import argparse

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="What is 17 * 23?")
parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:30001/v1")
if __name__ == "__main__":
    asked = parser.parse_args()
    print(f"asking {asked.base_url} for at most 4 samples: {asked.question}")
    print("the answer comes with the vote: after seconds on a GPU, minutes on a CPU", flush=True)

import sys

import openai


def main(question: str, base_url: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key="none")
    try:
        reply = client.chat.completions.create(
            model="adaptive@4?confidence=0.9",  # at most 4 chains; stops once the vote is settled
            messages=[{"role": "user", "content": question}],
            extra_body={"lim": {"template": "math"}},  # adds the words that ask for a boxed answer
        )
    except openai.APIConnectionError:
        sys.exit(f"error: no proxy answers at {base_url}: start one with `lim proxy`")
    print(reply.choices[0].message.content)
    print((reply.model_extra or {})["lim"]["votes"])


if __name__ == "__main__":
    main(asked.question, asked.base_url)
